package sandbox

// MergeOptions says how the work in a sandbox with a RootRepository comes back
// into that repository.
type MergeOptions struct {
	Message string // of the commit, and of the sandbox's last one; empty: a default
	Squash  bool   // one commit instead of the sandbox's own history
	// Force merges although the user's working tree has changes that are not
	// committed. They are kept: if the merge would touch one of these files, it
	// fails with Conflict.
	Force bool
}

// Merged is what became of a merge.
type Merged struct {
	Branch string   // where the sandbox's work is kept in any case
	Work   string   // the commit with the sandbox's work
	Head   string   // the commit that the user's branch is at now; empty when nothing was committed there
	Files  []string // that changed in the user's working tree
}
