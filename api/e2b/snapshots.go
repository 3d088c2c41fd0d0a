package e2b

import (
	"context"
	"net/http"
	"strings"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// snapshotInfo is one snapshot as a client sees it. To the API a snapshot is a
// template that has one build.
type snapshotInfo struct {
	SnapshotID string   `json:"snapshotID"`
	Names      []string `json:"names"`
}

// storedName is the node's name for a snapshot called name with a tag. Names
// of this API hold no dots, so the first dot ends the name.
func storedName(name, tag string) string {
	if tag == "" || tag == defaultTag {
		return name
	}
	return name + "." + tag
}

// snapshotID is what a client calls the snapshot: "team/name:tag", or for one
// without a name "id:default".
func snapshotID(s node.Snapshot) string {
	if s.Name == "" {
		return s.ID + ":" + defaultTag
	}
	name, tag, ok := strings.Cut(s.Name, ".")
	if !ok {
		tag = defaultTag
	}
	return s.Team + "/" + name + ":" + tag
}

func infoOf(s node.Snapshot) snapshotInfo {
	info := snapshotInfo{SnapshotID: snapshotID(s), Names: []string{}}
	if s.Name != "" {
		info.Names = append(info.Names, info.SnapshotID)
	}
	return info
}

// teamSnapshots lists what the team's users saved, newest first.
func (a *api) teamSnapshots(ctx context.Context, team, sandboxID string) ([]node.Snapshot, error) {
	all, err := a.node.Snapshots(ctx, sandboxID)
	if err != nil {
		return nil, err
	}
	own := all[:0]
	for _, s := range all {
		if s.Team == team {
			own = append(own, s)
		}
	}
	return own, nil
}

// names reports whether the reference means the snapshot.
func (r reference) names(s node.Snapshot) bool {
	if r.team != "" && r.team != s.Team {
		return false
	}
	if r.tag == "" || r.tag == defaultTag {
		return s.ID == r.name || s.Name == r.name
	}
	return s.Name == storedName(r.name, r.tag)
}

// findSnapshot returns the team's newest snapshot that ref means.
func (a *api) findSnapshot(ctx context.Context, team, ref string) (node.Snapshot, bool, error) {
	want, err := parseReference(ref)
	if err != nil {
		return node.Snapshot{}, false, nil // then it is no snapshot's name
	}
	own, err := a.teamSnapshots(ctx, team, "")
	if err != nil {
		return node.Snapshot{}, false, err
	}
	for _, s := range own {
		if want.names(s) {
			return s, true, nil
		}
	}
	return node.Snapshot{}, false, nil
}

func (a *api) createSnapshot(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Name string `json:"name"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	var ref reference
	if body.Name != "" {
		var err error
		if ref, err = parseReference(body.Name); err == nil && ref.team != "" && ref.team != key.Team {
			err = invalid("the name belongs to another team: %q", body.Name)
		}
		if err != nil {
			a.fail(w, r, err)
			return
		}
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		if sb.State != sandbox.Running {
			return sandbox.Errorf("e2b.snapshot", sandbox.Conflict, "", "sandbox %s is not running", sb.ID)
		}
		if ref.name != "" {
			if _, _, err := a.findTemplate(r.Context(), key.Team, ref.name); err == nil {
				return sandbox.Errorf("e2b.snapshot", sandbox.Exists, "", "a template is called %q", ref.name)
			}
		}
		snap, err := a.node.Snapshot(r.Context(), sb.ID, storedName(ref.name, ref.tag))
		if err != nil {
			return err
		}
		a.replaceOlder(r.Context(), key.Team, snap)
		writeJSON(w, http.StatusCreated, infoOf(snap))
		return nil
	})
}

// replaceOlder removes the snapshots whose name the new one has taken over. One
// that is still needed stays, and goes when it is no longer found by any name.
func (a *api) replaceOlder(ctx context.Context, team string, snap node.Snapshot) {
	if snap.Name == "" {
		return
	}
	own, err := a.teamSnapshots(ctx, team, "")
	if err != nil {
		return
	}
	for _, s := range own {
		if s.Name == snap.Name && s.ID != snap.ID && !s.Created.After(snap.Created) {
			if err := a.node.RemoveSnapshot(ctx, s.ID); err != nil {
				a.log.Warn("removing a snapshot that was replaced", "snapshot", s.ID, "error", err)
			}
		}
	}
}

func (a *api) listSnapshots(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q := r.URL.Query()
	limit, err := parseLimit(q.Get("limit"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	after, err := parseCursor(q.Get("nextToken"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	sandboxID, name := shortID(q.Get("sandboxID")), q.Get("name")
	if sandboxID != "" && name != "" {
		a.reject(w, r, "sandboxID and name cannot both be given")
		return
	}
	own, err := a.teamSnapshots(r.Context(), key.Team, sandboxID)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	if name != "" {
		own = matching(own, name)
	}
	part, token := page(own, func(s node.Snapshot) cursor { return cursor{at: s.Created, id: s.ID} }, after, limit, false)
	out := make([]snapshotInfo, 0, len(part))
	for _, s := range part {
		out = append(out, infoOf(s))
	}
	writePage(w, token, out)
}

// matching keeps the snapshots with a name or ID; without a tag in it, those of
// all tags.
func matching(all []node.Snapshot, name string) []node.Snapshot {
	want, err := parseReference(name)
	if err != nil {
		return nil
	}
	var out []node.Snapshot
	for _, s := range all {
		bare, _, _ := strings.Cut(s.Name, ".")
		if want.names(s) || want.tag == "" && bare == want.name && (want.team == "" || want.team == s.Team) {
			out = append(out, s)
		}
	}
	return out
}
