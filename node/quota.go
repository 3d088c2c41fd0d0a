package node

import (
	"context"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	defaultVolumeSize = 10 << 30 // bytes
	volumeEvery       = 15 * time.Second
)

// volumeUse is what a volume held when it was last looked at, and what was
// written through us since.
type volumeUse struct {
	bytes int64
	at    time.Time
}

// VolumeRoom is how many bytes may still be written into a volume; less than
// zero for one that is over its limit.
func (n *Node) VolumeRoom(v Volume) int64 {
	n.mu.RLock()
	use, seen := n.volumeUses[v.ID]
	n.mu.RUnlock()
	if !seen || time.Since(use.at) >= volumeEvery {
		use = n.measure(v)
	}
	return n.cfg.VolumeSize - use.bytes
}

// VolumeGrew notes bytes written into a volume by other than its sandboxes.
func (n *Node) VolumeGrew(v Volume, bytes int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	use := n.volumeUses[v.ID]
	use.bytes += bytes
	n.volumeUses[v.ID] = use
}

// measure adds up what a volume's files take on disk.
func (n *Node) measure(v Volume) volumeUse {
	use := volumeUse{at: time.Now()}
	_ = filepath.WalkDir(n.VolumePath(v), func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it changes while we look
		}
		if info, err := d.Info(); err == nil && !d.IsDir() {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				use.bytes += st.Blocks * 512
			}
		}
		return nil
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.volumeUses[v.ID] = use
	return use
}

// volumeLoop looks after the limits of volumes that sandboxes write to.
func (n *Node) volumeLoop(ctx context.Context) {
	defer n.done.Done()
	tick := time.NewTicker(volumeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			n.enforceVolumes(ctx)
		}
	}
}

// enforceVolumes freezes the running sandboxes that have a volume mounted which
// is over its limit: nothing they hold is lost, and they write no more until
// somebody makes room and resumes them.
func (n *Node) enforceVolumes(ctx context.Context) {
	for _, v := range n.Volumes(ctx, "") {
		users := n.volumeUsers(v, func(s sandbox.State) bool { return s == sandbox.Running })
		if len(users) == 0 || n.measure(v).bytes <= n.cfg.VolumeSize {
			continue
		}
		for _, r := range users {
			n.log.Warn("a volume is over its limit: its sandbox is frozen", "volume", v.ID, "limit", n.cfg.VolumeSize, "sandbox", r.ID)
			n.emit(sandbox.Event{Sandbox: r.ID, Kind: sandbox.EventResource, State: r.State, Reason: "volume " + v.Name + " is over its size limit"})
			if _, err := n.Pause(ctx, r.ID, PauseFrozen); err != nil && !sandbox.Is(err, sandbox.Conflict) {
				n.log.Error("freezing a sandbox whose volume is over its limit", "sandbox", r.ID, "error", err)
			}
		}
	}
}

// volumeUsers are the sandboxes in these states that have a volume mounted.
func (n *Node) volumeUsers(v Volume, in func(sandbox.State) bool) []Sandbox {
	path := n.VolumePath(v)
	return n.records(func(r Sandbox) bool {
		return in(r.State) && slices.ContainsFunc(r.Spec.Mounts, func(m sandbox.Mount) bool { return m.Source == path })
	})
}
