"""The built-in catalogue: what products there are, how sellers write, draw and photograph them."""
