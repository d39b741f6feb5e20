"""Search Simulation Tuning (Section 3.3): traces, judge, dataset, fidelity, serving."""
