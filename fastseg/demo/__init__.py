"""The drawn scenes, and the embedded model that segments them."""
