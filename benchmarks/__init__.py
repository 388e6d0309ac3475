"""Operators against peers and hardware floors: one harness, one file per group of cases. Run: python -m benchmarks"""
