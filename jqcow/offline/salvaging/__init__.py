"""What `jqcow.offline.salvage` is made of: opening, copying, and the files beside a target."""
