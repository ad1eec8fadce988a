"""Images in, as `pixel_values`, and out, as label maps and overlays."""
