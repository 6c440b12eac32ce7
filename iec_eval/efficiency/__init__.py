"""Efficiency methods: cheaper networks that stand in for the full one."""
