"""The frozen target model: its feature layers, its head, and its parallel forms."""
