"""The methods beside other people's code for the same: loops written anew, and the packages of the methods' authors."""
