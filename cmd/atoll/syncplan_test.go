package main

import (
	"io/fs"
	"math/rand/v2"
	"reflect"
	"testing"
)

func file(version int64) fileState {
	return fileState{Size: version, Time: version, Mode: 0o644, present: true}
}

var (
	nothing fileState
	folder  = fileState{Kind: fs.ModeDir, Mode: 0o755, present: true}
)

// conformance: FR2.4
func TestDecideCarriesOneSidedChangesAndReportsConflicts(t *testing.T) {
	agreed := synced{file(1), file(1)}
	sameSize := fileState{Size: 1, Time: 9, Mode: 0o644, present: true}
	for _, c := range []struct {
		name     string
		host, in fileState
		last     synced
		contents likeness
		side     prefer
		want     act
	}{
		{"nothing changed", file(1), file(1), agreed, unknown, preferNone, actNone},
		{"changed here", file(2), file(1), agreed, unknown, preferNone, actPush},
		{"changed there", file(1), file(2), agreed, unknown, preferNone, actPull},
		{"new here", file(1), nothing, synced{}, unknown, preferNone, actPush},
		{"new there", nothing, file(1), synced{}, unknown, preferNone, actPull},
		{"deleted here", nothing, file(1), agreed, unknown, preferNone, actPushDelete},
		{"deleted there", file(1), nothing, agreed, unknown, preferNone, actPullDelete},
		{"deleted on both sides", nothing, nothing, agreed, unknown, preferNone, actNone},
		{"deleted here, changed there", nothing, file(2), agreed, unknown, preferNone, actPull},
		{"changed here, deleted there", file(2), nothing, agreed, unknown, preferHost, actPush},
		{"changed on both sides", file(2), file(3), agreed, unknown, preferNone, actConflict},
		{"the host wins", file(2), file(3), agreed, unknown, preferHost, actPush},
		{"the sandbox wins", file(2), file(3), agreed, unknown, preferSandbox, actPull},
		{"same size on both sides: look", file(1), sameSize, synced{}, unknown, preferNone, actCompare},
		{"and they are equal", file(1), sameSize, synced{}, equal, preferNone, actNone},
		{"and they differ", file(1), sameSize, synced{}, different, preferNone, actConflict},
		{"look before anybody wins", file(1), sameSize, synced{}, unknown, preferHost, actCompare},
		{"directories on both sides", folder, folder, synced{}, unknown, preferNone, actNone},
		{"a directory here, a file there", folder, file(1), synced{}, unknown, preferNone, actConflict},
		{"a file became a directory", folder, file(1), agreed, unknown, preferHost, actConflict},
		{"equal links", fileState{Kind: fs.ModeSymlink, Link: "a", present: true}, fileState{Kind: fs.ModeSymlink, Link: "a", present: true}, synced{}, unknown, preferNone, actNone},
		{"different links", fileState{Kind: fs.ModeSymlink, Link: "a", present: true}, fileState{Kind: fs.ModeSymlink, Link: "b", present: true}, synced{}, unknown, preferNone, actConflict},
		{"mode changed here", fileState{Size: 1, Time: 1, Mode: 0o755, present: true}, file(1), agreed, unknown, preferNone, actPush},
	} {
		if got := decide(c.host, c.in, c.last, c.contents, c.side); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestPlanDeletesDeepestFirstAndKeepsFilledDirectories(t *testing.T) {
	last := map[string]synced{"d": {folder, folder}, "d/a": {file(1), file(1)}, "e": {folder, folder}, "e/b": {file(1), file(1)}}
	// d is deleted here with all in it; e too, but e/new has appeared there.
	host := map[string]fileState{}
	inside := map[string]fileState{"d": folder, "d/a": file(1), "e": folder, "e/b": file(1), "e/new": file(1)}
	want := []step{{actPull, "e"}, {actPull, "e/new"}, {actPushDelete, "e/b"}, {actPushDelete, "d/a"}, {actPushDelete, "d"}}
	if got := plan(host, inside, last, nil, preferNone); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestPlanLeavesAloneWhatIsBelowAConflict(t *testing.T) {
	host := map[string]fileState{"d": folder, "d/new": file(2), "d-not": file(3)}
	inside := map[string]fileState{"d": file(1)}
	want := []step{{actConflict, "d"}, {actPush, "d-not"}}
	if got := plan(host, inside, nil, nil, preferNone); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// sides is a model of two directories to run plans on.
type sides struct{ host, inside map[string]fileState }

func (s sides) apply(steps []step) {
	for _, st := range steps {
		switch st.Act {
		case actPush:
			s.inside[st.Path] = s.host[st.Path]
		case actPull:
			s.host[st.Path] = s.inside[st.Path]
		case actPushDelete:
			delete(s.inside, st.Path)
		case actPullDelete:
			delete(s.host, st.Path)
		}
	}
}

// conformance: FR2.4
func TestSyncConvergesAndLosesNoChange(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		s := sides{map[string]fileState{}, map[string]fileState{}}
		last := map[string]synced{}
		version := int64(0)
		for range 6 {
			changed := map[string][2]bool{}
			for range r.IntN(5) {
				name := string(rune('a' + r.IntN(4)))
				side, m := 0, s.host
				if r.IntN(2) == 1 {
					side, m = 1, s.inside
				}
				if version++; r.IntN(3) == 0 {
					delete(m, name)
				} else {
					m[name] = file(version)
				}
				c := changed[name]
				c[side] = true
				changed[name] = c
			}
			before := sides{copyOf(s.host), copyOf(s.inside)}
			steps := plan(s.host, s.inside, last, nil, preferNone)
			s.apply(steps)
			open := map[string]bool{}
			for _, st := range steps {
				open[st.Path] = st.Act == actConflict
				if st.Act != actConflict {
					delete(open, st.Path)
				}
			}
			for name, c := range changed {
				for side, m := range []map[string]fileState{before.host, before.inside} {
					wrote, here := m[name]
					if c[side] && here && s.host[name] != wrote && s.inside[name] != wrote {
						t.Fatalf("seed %d: version %d of %s is lost", seed, wrote.Time, name)
					}
				}
			}
			last = agree(s.host, s.inside, last, open)
			for name := range open {
				if s.host[name] == s.inside[name] {
					t.Fatalf("seed %d: %s is a conflict of equals", seed, name)
				}
			}
			again := plan(s.host, s.inside, last, nil, preferNone)
			for _, st := range again {
				if !open[st.Path] {
					t.Fatalf("seed %d: %v is still to do", seed, st)
				}
			}
			for name := range open { // somebody settles it
				s.inside[name] = s.host[name]
				if !s.host[name].present {
					delete(s.host, name)
					delete(s.inside, name)
				}
				last[name] = synced{s.host[name], s.inside[name]}
			}
		}
	}
}

func copyOf(m map[string]fileState) map[string]fileState {
	c := make(map[string]fileState, len(m))
	for k, v := range m {
		c[k] = v
	}
	return c
}
