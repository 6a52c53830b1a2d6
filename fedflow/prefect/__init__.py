"""What needs the workflow engine but is no flow: dispatch, artifacts, deployments, the sites' workers."""
