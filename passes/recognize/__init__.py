"""Recognition: from a functional view to sites. `sites.recognize` is the way in."""
