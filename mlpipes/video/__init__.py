"""Video: upscaled frame by frame, in parallel, exactly resumable, with everything else of the file kept."""
