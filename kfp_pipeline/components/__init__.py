"""The pipeline's steps: thin doors to the stages of the library."""
