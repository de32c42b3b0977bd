"""The built-in catalogue's parts: what products there are, how sellers write, how they are drawn and photographed."""
