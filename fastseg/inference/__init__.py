"""Label maps of images: whole or by sliding windows."""
