"""What works on this machine: `python -m unitdist doctor`. Checks are functions of plain values; `examine` gathers these."""
