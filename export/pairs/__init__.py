"""Target and draft as one bundle: the rules of each runtime, the layouts, the launch files, the certification."""
