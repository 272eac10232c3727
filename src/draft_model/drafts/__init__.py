"""Draft families: each a folder with its model, its objective, its decoding and its file format."""
