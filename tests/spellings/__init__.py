"""Programs that spell attention, or only look like it, and the tests that run them."""
