"""One thin module a Snakemake rule; `python -m harness <stage>` imports only the one it runs."""
