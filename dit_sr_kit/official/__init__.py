"""What we know about released files: one module for each family of networks."""
