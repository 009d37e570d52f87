"""The parts of a search that need no Ray: proposals, rules, trials, selection and its report."""
