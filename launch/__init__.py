"""Getting runs onto TPUs: what a step will cost there, by the TPU compiler and without a TPU."""
