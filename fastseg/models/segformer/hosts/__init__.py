"""SegFormers of other libraries: where their parts are, and the fast forwards that they are given.

No library is imported. A host is recognised by the names of its modules (`encoders`, `heads`), and
that they compute what the names say is checked before anything is replaced (`trial.py`).
"""
