"""What will happen: the SimPy engine, network models, workloads, and the compiled replay."""
