"""Tracking: MLflow. One run per fingerprint, whatever crashed and restarted; curves without gaps or doubles; registry."""
