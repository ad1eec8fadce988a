"""All that is to be known of a machine with a GPU, in one command."""
