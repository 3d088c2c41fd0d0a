package main

import (
	"io/fs"
	"maps"
	"slices"
	"strings"
)

// fileState is what one side of a sync holds at a path. The zero value means
// that there is nothing.
type fileState struct {
	Kind fs.FileMode // 0: a file, fs.ModeDir, fs.ModeSymlink; see present
	Mode fs.FileMode // permission bits
	Size int64       // bytes, of a file
	Time int64       // nanoseconds since 1970, when a file was changed last
	Link string      // where a symlink leads

	present bool
}

// same reports whether two states of one side are the same version. A
// directory's time and size say nothing about it.
func (s fileState) same(o fileState) bool {
	if s.present != o.present || s.Kind != o.Kind {
		return false
	}
	switch {
	case !s.present:
		return true
	case s.Kind == fs.ModeDir:
		return true
	case s.Kind == fs.ModeSymlink:
		return s.Link == o.Link
	}
	return s.Size == o.Size && s.Time == o.Time && s.Mode == o.Mode
}

// synced is what both sides held at a path when they last agreed.
type synced struct{ host, sandbox fileState }

// act is what to do about one path.
type act string

const (
	actNone       act = ""
	actPush       act = "push"        // host to sandbox
	actPull       act = "pull"        // sandbox to host
	actPushDelete act = "push-delete" // delete in the sandbox
	actPullDelete act = "pull-delete" // delete on the host
	actCompare    act = "compare"     // both changed: the contents decide, see decide
	actConflict   act = "conflict"    // both changed, differently; nothing is touched
)

// prefer says which side wins a conflict.
type prefer string

const (
	preferNone    prefer = "none"
	preferHost    prefer = "host"
	preferSandbox prefer = "sandbox"
)

// likeness is what is known of two files' contents.
type likeness int

const (
	unknown likeness = iota
	equal
	different
)

// decide says what to do about a path, from what both sides hold now and what
// they held when they last agreed (zero if they never did). It is a pure
// function and never loses a change: a deletion on one side yields to a change
// on the other, and changes on both sides are a conflict unless their
// contents are equal.
func decide(host, sandbox fileState, last synced, contents likeness, side prefer) act {
	hostChanged, sandboxChanged := !host.same(last.host), !sandbox.same(last.sandbox)
	switch {
	case !hostChanged && !sandboxChanged:
		return actNone
	case !host.present && !sandbox.present:
		return actNone // deleted on both sides
	case host.present && sandbox.present && (host.Kind == fs.ModeDir) != (sandbox.Kind == fs.ModeDir):
		return actConflict // one would have to go with all below it, whoever is preferred
	case hostChanged && !sandboxChanged:
		return sendTo(actPush, actPushDelete, host)
	case sandboxChanged && !hostChanged:
		return sendTo(actPull, actPullDelete, sandbox)
	case !host.present: // deleted here, changed there
		return actPull
	case !sandbox.present:
		return actPush
	case host.Kind == fs.ModeDir:
		return actNone // what is in them is decided path by path
	case host.Kind == sandbox.Kind && host.Kind == fs.ModeSymlink && host.Link == sandbox.Link:
		return actNone
	case host.Kind == 0 && sandbox.Kind == 0 && host.Size == sandbox.Size && contents == unknown:
		return actCompare
	case host.Kind == 0 && sandbox.Kind == 0 && contents == equal:
		return actNone
	}
	switch side {
	case preferHost:
		return actPush
	case preferSandbox:
		return actPull
	}
	return actConflict
}

func sendTo(send, remove act, source fileState) act {
	if source.present {
		return send
	}
	return remove
}

// step is one thing to do.
type step struct {
	Act  act
	Path string // relative, with slashes
}

// plan decides for all paths; below a conflict nothing is done. Deletions come after everything else and deepest
// first, so that directories are empty when their turn comes. A directory is
// not deleted when something below it is to stay.
func plan(host, sandbox map[string]fileState, last map[string]synced, contents map[string]likeness, side prefer) []step {
	paths := map[string]bool{}
	for _, m := range []map[string]fileState{host, sandbox} {
		for p := range m {
			paths[p] = true
		}
	}
	for p := range last {
		paths[p] = true
	}
	var steps, deletions []step
	kept := map[string]bool{}    // directories that something stays in
	blocked := map[string]bool{} // conflicts and what is below them
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		s := step{decide(host[p], sandbox[p], last[p], contents[p], side), p}
		if blocked[p] = s.Act == actConflict || blocked[parentOf(p)]; blocked[parentOf(p)] {
			s.Act = actNone
		}
		switch s.Act {
		case actPushDelete, actPullDelete:
			deletions = append(deletions, s)
			continue
		case actNone:
			if !host[p].present && !sandbox[p].present {
				continue
			}
		default:
			steps = append(steps, s)
		}
		for dir := parentOf(p); dir != ""; dir = parentOf(dir) {
			kept[dir] = true
		}
	}
	slices.Reverse(deletions) // a path sorts before what is below it
	for _, s := range deletions {
		if kept[s.Path] { // deleted on one side, but filled on the other: it comes back
			s.Act = map[act]act{actPushDelete: actPull, actPullDelete: actPush}[s.Act]
			steps = append([]step{s}, steps...)
			continue
		}
		steps = append(steps, s)
	}
	return steps
}

func parentOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return ""
}

// agree returns the record for the next round: what both sides hold, for the
// paths on which they agree, and the old record for those on which they do not.
func agree(host, sandbox map[string]fileState, last map[string]synced, open map[string]bool) map[string]synced {
	next := make(map[string]synced, len(host))
	for p, h := range host {
		if s, both := sandbox[p]; both && !open[p] {
			next[p] = synced{h, s}
		}
	}
	for p := range open {
		if old, known := last[p]; known {
			next[p] = old
		}
	}
	return next
}
