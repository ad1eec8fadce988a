"""`fastseg.accelerate` on models of other libraries: real ones, and two structured as theirs."""
