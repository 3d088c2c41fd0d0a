package image

import (
	"context"

	"github.com/atoll-run/atoll/sandbox"
)

// BaseName is the template that exists from the first start of a node.
const BaseName = "base"

// basePackages is what agents expect of a machine: E2B's clients wait for ports
// with ss and call python3 python. perl comes with git.
var basePackages = []string{"adduser", "bash", "ca-certificates", "curl", "git", "iproute2", "login", "passwd", "procps", "python-is-python3", "python3", "sudo"}

// baseScript makes the user that sandboxes run as by default. Its name and
// number are those of E2B's templates.
const baseScript = `set -eu
chroot "$1" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' > "$1/etc/sudoers.d/user"
chmod 440 "$1/etc/sudoers.d/user"
`

// baseOptions is the recipe of the template.
func baseOptions() DebianOptions {
	return DebianOptions{
		Name:     BaseName,
		Packages: basePackages,
		Script:   baseScript,
		Config: Config{
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
			User:       "user",
			WorkingDir: "/home/user",
			Cmd:        []string{"/bin/bash"},
		},
	}
}

// EnsureBase returns the template "base" and builds it when it is missing or its
// recipe has changed. It is made of the distribution's packages, without a
// registry; see BuildDebian for its errors. An older one is better than none when
// the mirror does not answer. Two processes that need it at once build it once.
// progress may be nil.
func (s *Store) EnsureBase(ctx context.Context, progress func(Progress)) (Image, error) {
	const op = "image.EnsureBase"
	o := baseOptions()
	o.Progress = progress
	host, err := hostDistribution()
	if err != nil {
		return Image{}, sandbox.E(op, sandbox.Unsupported, BaseName, err).WithHint("import or pull an image and tag it 'base'")
	}
	o.Suite = host.codename
	if i, ok := s.upToDate(o); ok {
		return i, nil
	}
	lock, err := s.openLocked(ctx, s.path("base.lock"))
	if err != nil {
		return Image{}, fail(op, BaseName, err)
	}
	defer lock.Close()
	if i, ok := s.upToDate(o); ok {
		return i, nil
	}
	i, err := s.BuildDebian(ctx, o)
	if old, found := s.Get(BaseName); err != nil && found == nil && ctx.Err() == nil {
		s.log.Warn("the template made from an older recipe is used, since a new one cannot be built", "image", BaseName, "err", err)
		return old, nil
	}
	return i, err
}

// upToDate returns the image that a recipe led to before. An image of that name
// that somebody imported or pulled is taken as it is, unless its root is damaged.
func (s *Store) upToDate(o DebianOptions) (Image, bool) {
	i, err := s.Get(o.Name)
	if err != nil || i.Key != "" && i.Key != o.key() || s.VerifyRoot(i.Root) != nil {
		return Image{}, false
	}
	return i, true
}
