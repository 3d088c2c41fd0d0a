package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/runtime/supervisor"
	"github.com/atoll-run/atoll/sandbox"
	"golang.org/x/sys/unix"
)

// manifestName is our own description of a snapshot, beside gVisor's files.
const manifestName = "gvisor.json"

// manifest says what a snapshot needs to be restored.
type manifest struct {
	Format    int               `json:"format"`
	GVisor    string            `json:"gvisor"` // module version: its state has no format that outlives it
	Arch      string            `json:"arch"`
	Root      sandbox.Root      `json:"root"`
	Resources sandbox.Resources `json:"resources"`
	Mounts    []sandbox.Mount   `json:"mounts,omitempty"`
	Images    images            `json:"images"` // copies of them are in the snapshot
}

const manifestFormat = 1

// buildID is the version of gVisor in this binary.
func buildID() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, m := range info.Deps {
		if m.Path == "gvisor.dev/gvisor" {
			return m.Version
		}
	}
	return "unknown"
}

// Snapshot writes the sandbox's whole state into dir. When that fails, the
// sandbox goes on as it was and dir is left empty.
func (r *Runtime) Snapshot(ctx context.Context, id, dir string, opts sandbox.SnapshotOptions) error {
	return r.boxes.Snapshot(ctx, "gvisor.Snapshot", id, dir, opts, func(b *box, s *sentry) error {
		return s.save(ctx, b.Record(), r.images(), dir)
	})
}

// save writes and syncs all files of a snapshot. The sandbox is afterwards as it was.
func (s *sentry) save(ctx context.Context, rec *record, images, dir string) error {
	opts := orders.Save{Metadata: orders.Uncompressed, HavePagesFile: true, Resume: true}
	defer func() { closeAll(opts.FilePayload.Files) }()
	for _, name := range orders.StateFiles {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		opts.FilePayload.Files = append(opts.FilePayload.Files, f)
	}
	if err := call(ctx, s.dir, orders.CallSave, &opts, nil); err != nil {
		return fmt.Errorf("save the sentry's state: %w", fullDisk(dir, err))
	}
	for _, f := range opts.FilePayload.Files {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	for _, name := range rec.Images.list() {
		if err := supervisor.LinkFile(filepath.Join(dir, name), filepath.Join(images, name)); err != nil {
			return err
		}
	}
	m := manifest{
		Format: manifestFormat, GVisor: buildID(), Arch: runtime.GOARCH, Root: rec.Spec.Root,
		Resources: rec.Resources, Mounts: rec.Spec.Mounts, Images: rec.Images,
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := supervisor.WriteSynced(filepath.Join(dir, manifestName), data); err != nil {
		return err
	}
	return supervisor.Sync(dir)
}

// Restore makes a sandbox from the state in dir.
func (r *Runtime) Restore(ctx context.Context, spec sandbox.Spec, dir string) error {
	const op = "gvisor.Restore"
	if err := r.check(op, spec); err != nil {
		return err
	}
	m, err := readManifest(dir)
	if err != nil {
		return sandbox.E(op, sandbox.Invalid, spec.ID, err)
	}
	if err := m.check(spec, spec.Resources.Or(r.cfg.Defaults)); err != nil {
		return sandbox.E(op, sandbox.Invalid, spec.ID, err)
	}
	for _, name := range m.Images.list() {
		if err := r.keepImage(dir, name); err != nil {
			return sandbox.E(op, supervisor.Kind(err), spec.ID, err)
		}
	}
	return r.make(ctx, op, spec, dir, m.Images)
}

// readManifest reads our part of a snapshot.
func readManifest(dir string) (m manifest, err error) {
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return m, fmt.Errorf("no snapshot of this runtime: %w", err)
	}
	return parseManifest(data)
}

// parseManifest decodes a manifest, which may come from another node.
func parseManifest(data []byte) (m manifest, err error) {
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("damaged snapshot manifest: %w", err)
	}
	if m.Format != manifestFormat {
		return m, fmt.Errorf("snapshot has format %d, this version reads %d", m.Format, manifestFormat)
	}
	for _, name := range m.Images.list() {
		if name != filepath.Base(name) || filepath.Ext(name) != imageSuffix {
			return m, fmt.Errorf("damaged snapshot manifest: image %q", name)
		}
	}
	return m, nil
}

// check says why a snapshot cannot become what spec wants.
func (m manifest) check(spec sandbox.Spec, res sandbox.Resources) error {
	switch {
	case m.GVisor != buildID():
		return fmt.Errorf("the snapshot was made by gVisor %s and this is %s, which cannot read it; make the sandbox anew", m.GVisor, buildID())
	case m.Arch != runtime.GOARCH:
		return fmt.Errorf("the snapshot is of a %s machine and this is %s", m.Arch, runtime.GOARCH)
	case m.Root.Kind != spec.Root.Kind || m.Root.Digest != spec.Root.Digest:
		return fmt.Errorf("the snapshot's root is %s %s, not %s %s", m.Root.Kind, m.Root.Digest, spec.Root.Kind, spec.Root.Digest)
	case m.Resources != res:
		return fmt.Errorf("the snapshot's resources are %+v, not %+v", m.Resources, res)
	case len(m.Mounts) != len(spec.Mounts):
		return fmt.Errorf("the snapshot has %d mounts, not %d", len(m.Mounts), len(spec.Mounts))
	}
	for i, want := range m.Mounts {
		if got := spec.Mounts[i]; got.Target != want.Target || got.ReadOnly != want.ReadOnly {
			return fmt.Errorf("the snapshot's mount %d is at %s, not %s", i, want.Target, got.Target)
		}
	}
	return nil
}

// keepImage makes sure that an image of a snapshot is in our directory, since the
// sandbox may outlive the snapshot.
func (r *Runtime) keepImage(dir, name string) error {
	path := filepath.Join(r.images(), name)
	if _, err := os.Stat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tmp, err := os.CreateTemp(r.images(), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	tmp.Close()
	if err := supervisor.CopyFile(tmp.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// fullDisk adds ENOSPC to an error that crossed the sentry as text, when the
// directory's file system has no room.
func fullDisk(dir string, err error) error {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && st.Bavail*uint64(st.Bsize) < 1<<20 {
		return errors.Join(unix.ENOSPC, err)
	}
	return err
}
