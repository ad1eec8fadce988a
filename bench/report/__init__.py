"""Tables and pictures of rows; nothing in them is typed by hand."""
