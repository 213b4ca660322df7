"""Studies: cells of one recipe that differ in what is studied, run, compared and judged."""
