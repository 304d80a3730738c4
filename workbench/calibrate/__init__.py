"""Cost models from measured runs, and measuring them."""
