"""From images to their label maps: whole or by sliding windows."""
