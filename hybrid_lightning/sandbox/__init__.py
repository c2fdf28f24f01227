"""Runs untrusted Python programs in isolation; needs nothing but the standard library, of which each start loads little."""
