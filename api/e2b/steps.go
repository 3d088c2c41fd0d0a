package e2b

import (
	"slices"
	"strings"

	"github.com/atoll-run/atoll/image"
)

// buildStep is one instruction of a build, in the words of a Dockerfile.
type buildStep struct {
	Type      string   `json:"type"`
	Args      []string `json:"args"`
	FilesHash string   `json:"filesHash"` // of COPY: the archive that was uploaded
	Force     bool     `json:"force"`     // do it and all after it anew
}

// maxSteps bounds a build.
const maxSteps = 500

// Who commands run as and where, unless a step says otherwise.
const (
	buildUser = "user"
	buildHome = "/home/user"
)

// provision gives an image that comes from elsewhere what clients expect of
// every template: the user "user", who may become root where there is sudo.
const provision = `set -e
id user >/dev/null 2>&1 || useradd -m -s /bin/bash user 2>/dev/null || adduser -D -s /bin/sh user
mkdir -p /home/user
chown user: /home/user
if [ -d /etc/sudoers.d ]; then printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/90-user; chmod 440 /etc/sudoers.d/90-user; fi`

// prepared are the steps before a client's own when it starts from an image.
func prepared() []image.Step {
	return []image.Step{
		{Op: image.OpRun, Args: []string{provision}, User: "root", Text: "prepare the image"},
		{Op: image.OpUser, Args: []string{buildUser}},
		{Op: image.OpWorkdir, Args: []string{buildHome}},
	}
}

// toSteps turns a client's instructions into steps. user is who they begin as
// and so who owns what they copy; archive finds the files of a COPY by their hash and says whether
// they are there.
func toSteps(in []buildStep, user string, archive func(hash string) (path string, ok bool)) ([]image.Step, error) {
	if len(in) > maxSteps {
		return nil, invalid("a build has at most %d steps", maxSteps)
	}
	out := make([]image.Step, 0, len(in))
	for i, s := range in {
		step, err := toStep(s, user, archive)
		if err != nil {
			return nil, invalid("step %d, %s: %s", i+1, s.Type, messageOf(err))
		}
		if step.Op == image.OpUser {
			user = step.Args[0]
		}
		step.NoCache = s.Force
		out = append(out, step)
	}
	return out, nil
}

func toStep(s buildStep, user string, archive func(string) (string, bool)) (image.Step, error) {
	arg := func(i int) string {
		if i < len(s.Args) {
			return s.Args[i]
		}
		return ""
	}
	if slices.ContainsFunc(s.Args, func(a string) bool { return strings.ContainsRune(a, 0) }) {
		return image.Step{}, invalid("an argument holds a zero byte")
	}
	if arg(0) == "" {
		return image.Step{}, invalid("an argument is missing")
	}
	switch strings.ToUpper(s.Type) {
	case "RUN": // command [user]
		return image.Step{Op: image.OpRun, Args: []string{arg(0)}, User: arg(1), Text: "RUN " + arg(0)}, nil
	case "COPY": // source destination [user] [mode]
		if arg(1) == "" {
			return image.Step{}, invalid("the destination is missing")
		}
		if !hashPattern().MatchString(s.FilesHash) {
			return image.Step{}, invalid("filesHash must be a SHA-256 in hexadecimal")
		}
		path, ok := archive(s.FilesHash)
		if !ok {
			return image.Step{}, invalid("the files with the hash %s have not been uploaded", s.FilesHash)
		}
		if owner := arg(2); owner != "" {
			user = owner
		}
		return image.Step{Op: image.OpCopy, Args: []string{arg(0), arg(1)}, Archive: path, Chown: user, Chmod: arg(3),
			Text: "COPY " + arg(0) + " " + arg(1)}, nil
	case "ENV": // key value ...
		if len(s.Args)%2 != 0 {
			return image.Step{}, invalid("a value is missing")
		}
		step := image.Step{Op: image.OpEnv, Text: "ENV"}
		for pair := range slices.Chunk(s.Args, 2) {
			if pair[0] == "" || strings.ContainsAny(pair[0], "= \t\n") {
				return image.Step{}, invalid("%q cannot be the name of a variable", pair[0])
			}
			step.Args = append(step.Args, pair[0]+"="+pair[1])
			step.Text += " " + pair[0] // values may be secret
		}
		return step, nil
	case "WORKDIR":
		return image.Step{Op: image.OpWorkdir, Args: []string{arg(0)}, Text: "WORKDIR " + arg(0)}, nil
	case "USER":
		return image.Step{Op: image.OpUser, Args: []string{arg(0)}, Text: "USER " + arg(0)}, nil
	}
	return image.Step{}, invalid("there is no such instruction")
}

// isBaseImage reports whether an image's name means E2B's own base image, which
// here is the template that every node has.
func isBaseImage(name string) bool {
	name = strings.TrimPrefix(name, "docker.io/")
	bare, _, _ := strings.Cut(name, ":")
	return bare == "e2bdev/base"
}
