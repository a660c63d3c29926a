"""A study's config, resolved into jobs with their places on disk. Imports no torch."""
