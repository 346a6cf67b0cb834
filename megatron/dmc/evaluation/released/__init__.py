"""The comparison on a released model, whose weights stay as they are: adapters of DMS beside what needs no training."""
