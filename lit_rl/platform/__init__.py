"""The job service: starts runs of this project, keeps what they report, and shows it."""
