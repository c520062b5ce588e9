"""The `bfaas` command."""
