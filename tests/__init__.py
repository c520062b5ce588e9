"""Tests of `bfaas`."""
