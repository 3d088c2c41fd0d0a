package node

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// CreateVolume makes an empty volume. Names are unique within a team.
func (n *Node) CreateVolume(ctx context.Context, team, name string) (Volume, error) {
	const op = "node.CreateVolume"
	if !nameOK(name) {
		return Volume{}, sandbox.Errorf(op, sandbox.Invalid, name, "not a name for a volume")
	}
	v := Volume{ID: sandbox.NewID(), Name: name, Team: cmp.Or(team, defaultTeam), Token: newToken(), Created: time.Now().UTC()}
	n.mu.Lock()
	for _, old := range n.volumes {
		if old.Team == v.Team && old.Name == name {
			n.mu.Unlock()
			return Volume{}, sandbox.Errorf(op, sandbox.Exists, name, "the team has a volume of this name")
		}
	}
	n.volumes[v.ID] = v // holds the name while the directory is made
	n.mu.Unlock()
	// What root in a sandbox makes belongs to root here, setuid bit and all: no
	// other user of the host may come near it.
	above := filepath.Dir(n.VolumePath(v))
	err := os.MkdirAll(above, 0o700)
	if err == nil {
		err = os.Chmod(above, 0o700)
	}
	if err == nil {
		err = os.Mkdir(n.VolumePath(v), 0o777)
	}
	if err == nil {
		err = os.Chmod(n.VolumePath(v), 0o777) // any user of the sandbox may write, whatever our umask
	}
	if err == nil {
		err = n.store.put(ctx, kindVolume, v.ID, v)
	}
	if err != nil {
		n.mu.Lock()
		delete(n.volumes, v.ID)
		n.mu.Unlock()
		return Volume{}, sandbox.E(op, "", name, err)
	}
	return v, nil
}

// Volumes lists a team's volumes, or all when team is empty, by name.
func (n *Node) Volumes(_ context.Context, team string) []Volume {
	n.mu.RLock()
	defer n.mu.RUnlock()
	var out []Volume
	for _, v := range n.volumes {
		if team == "" || v.Team == team {
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b Volume) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// GetVolume returns the volume with this ID, or this name within the team.
func (n *Node) GetVolume(ctx context.Context, team, ref string) (Volume, error) {
	for _, v := range n.Volumes(ctx, team) {
		if v.ID == ref || v.Name == ref {
			return v, nil
		}
	}
	return Volume{}, sandbox.Errorf("node.GetVolume", sandbox.NotFound, ref, "no such volume")
}

// RemoveVolume deletes a volume with all that is in it, unless a live sandbox
// has it mounted.
func (n *Node) RemoveVolume(ctx context.Context, team, ref string) error {
	const op = "node.RemoveVolume"
	v, err := n.GetVolume(ctx, team, ref)
	if err != nil {
		return err
	}
	if users := n.volumeUsers(v, live); len(users) > 0 {
		return sandbox.Errorf(op, sandbox.Conflict, ref, "sandbox %s uses it", users[0].Name)
	}
	if err := n.store.delete(ctx, kindVolume, v.ID); err != nil {
		return err
	}
	n.mu.Lock()
	delete(n.volumes, v.ID)
	delete(n.volumeUses, v.ID)
	n.mu.Unlock()
	if err := os.RemoveAll(n.VolumePath(v)); err != nil {
		return sandbox.E(op, sandbox.Internal, ref, err)
	}
	return nil
}

// VolumePath is where a volume's files lie on this host.
func (n *Node) VolumePath(v Volume) string { return filepath.Join(n.cfg.Dir, "volumes", v.ID) }

// addVolumes turns the record's named volumes into mounts.
func (n *Node) addVolumes(rec *Sandbox) error {
	for _, m := range rec.Volumes {
		v, err := n.GetVolume(context.Background(), rec.Team, m.Name)
		if err != nil {
			return err
		}
		if room := n.VolumeRoom(v); room < 0 {
			return sandbox.Errorf("node.Create", sandbox.Exhausted, m.Name, "the volume is %d bytes over its limit of %d", -room, n.cfg.VolumeSize).
				WithHint("remove files from it")
		}
		rec.Spec.Mounts = append(rec.Spec.Mounts, sandbox.Mount{Source: n.VolumePath(v), Target: m.Path})
	}
	return nil
}
