"""From images to `pixel_values`, and from logits to label maps and overlays."""
