"""A seeded fuzzer: random attention programs, optimised unverified and held to the original."""
