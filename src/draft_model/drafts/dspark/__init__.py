"""Block drafts: DSpark, and DFlash as its case without Markov and confidence heads."""
