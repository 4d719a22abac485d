"""`hafnium demo`: the whole loop on one machine, on real parts.

`run` is the play: gather → features → train → serve → roll out v2 → roll out v3 → verdict and report.
"""
