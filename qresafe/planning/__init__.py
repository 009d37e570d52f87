"""Will it fit, how long does it take, what does it cost: computed before anything is loaded."""
