"""What is measured, a file each; `run` has what they share."""
