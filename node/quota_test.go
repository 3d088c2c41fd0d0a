package node

import (
	"context"
	"testing"

	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
)

// newHostWithVolumes is a host whose volumes hold a MiB each. Its runtime accepts
// mounts, and shows its sandboxes the host's files instead.
func newHostWithVolumes(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	caps := fake.Capabilities()
	caps.Mounts, h.caps = true, &caps
	h.crash()
	h.open()
	h.cfg.VolumeSize = 1 << 20
	return h
}

func TestASandboxWhoseVolumeIsOverItsLimitIsFrozenUntilThereIsRoom(t *testing.T) {
	h, ctx := newHostWithVolumes(t), context.Background()
	for _, name := range []string{"data", "other"} {
		if _, err := h.CreateVolume(ctx, "", name); err != nil {
			t.Fatal(err)
		}
	}
	v, err := h.GetVolume(ctx, "", "data")
	if err != nil {
		t.Fatal(err)
	}
	h.create(CreateRequest{Name: "writer", Volumes: []VolumeMount{{Name: "data", Path: "/data"}}})
	h.create(CreateRequest{Name: "bystander", Volumes: []VolumeMount{{Name: "other", Path: "/data"}}})
	write := "head -c 2000000 /dev/urandom >" + h.VolumePath(v) + "/big" // the fake runtime's files are the host's
	h.sh("writer", write)
	h.enforceVolumes(ctx)
	if w, b := h.state("writer"), h.state("bystander"); w != sandbox.Paused || b != sandbox.Running {
		t.Errorf("the writer is %s, the one with another volume %s", w, b)
	}
	_, err = h.Create(ctx, CreateRequest{Image: HostImage, Volumes: []VolumeMount{{Name: "data", Path: "/data"}}})
	wantKind(t, err, sandbox.Exhausted)

	h.sh("bystander", "rm "+h.VolumePath(v)+"/big")
	if _, err := h.Resume(ctx, "writer"); err != nil {
		t.Fatal(err)
	}
	h.enforceVolumes(ctx)
	if s := h.state("writer"); s != sandbox.Running {
		t.Errorf("there is room, and it is %s", s)
	}
	h.sh("writer", "echo small >"+h.VolumePath(v)+"/small")
}

func TestASandboxThatCannotBeFrozenIsTriedAgain(t *testing.T) {
	h, ctx := newHostWithVolumes(t), context.Background()
	v, err := h.CreateVolume(ctx, "", "data")
	if err != nil {
		t.Fatal(err)
	}
	h.create(CreateRequest{Name: "writer", Volumes: []VolumeMount{{Name: "data", Path: "/data"}}})
	h.sh("writer", "head -c 2000000 /dev/urandom >"+h.VolumePath(v)+"/big")
	h.world.Inject(fake.Fault{Op: "Pause", Kind: sandbox.Unavailable, Times: 1})
	h.enforceVolumes(ctx)
	h.enforceVolumes(ctx)
	if s := h.state("writer"); s != sandbox.Paused {
		t.Errorf("it is %s", s)
	}
}
