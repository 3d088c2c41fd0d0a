package sandbox

import (
	"math"
	"testing"
)

func TestCheckTellsNonsenseFromWhatIsNotDeclared(t *testing.T) {
	caps := Capabilities{Roots: []RootKind{RootHost}, Networks: []NetworkMode{NetworkNone, NetworkSandbox}, Mounts: true}
	good := Spec{ID: "a1", Root: Root{Kind: RootHost}, Network: NetworkNone}
	if err := caps.Check("test", good); err != nil {
		t.Fatalf("a good spec is refused: %v", err)
	}
	for name, c := range map[string]struct {
		edit func(*Spec)
		want Kind
	}{
		"id":              {func(s *Spec) { s.ID = "a-b" }, Invalid},
		"cpus":            {func(s *Spec) { s.Resources.CPUs = math.NaN() }, Invalid},
		"memory":          {func(s *Spec) { s.Resources.Memory = -1 }, Invalid},
		"root":            {func(s *Spec) { s.Root.Kind = "" }, Invalid},
		"undeclared root": {func(s *Spec) { s.Root.Kind = RootEROFS }, Unsupported},
		"network":         {func(s *Spec) { s.Network = "" }, Invalid},
		"undeclared net":  {func(s *Spec) { s.Network = NetworkHost }, Unsupported},
		"link":            {func(s *Spec) { s.Network = NetworkSandbox }, Invalid},
		"mount source":    {func(s *Spec) { s.Mounts = []Mount{{Source: "x", Target: "/x"}} }, Invalid},
		"mount target":    {func(s *Spec) { s.Mounts = []Mount{{Source: "/x", Target: "/a/../b"}} }, Invalid},
		"mount over root": {func(s *Spec) { s.Mounts = []Mount{{Source: "/x", Target: "/"}} }, Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			spec := good
			c.edit(&spec)
			if err := caps.Check("test", spec); !Is(err, c.want) {
				t.Errorf("Check: %v, want %s", err, c.want)
			}
		})
	}
	caps.Mounts = false
	good.Mounts = []Mount{{Source: "/x", Target: "/x"}}
	if err := caps.Check("test", good); !Is(err, Unsupported) {
		t.Errorf("Check of undeclared mounts: %v, want unsupported", err)
	}
}
